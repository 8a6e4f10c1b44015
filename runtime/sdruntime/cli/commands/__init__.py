"""The commands of sdruntime, one file each."""

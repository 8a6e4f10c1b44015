"""The settings in the config.json of each network: those that are read, ignored or refused."""

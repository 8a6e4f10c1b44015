"""The types that all backends share: records, requests, results, and the engine protocol."""

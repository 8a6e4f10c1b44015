"""What is requested: settings, their ranges, and what to say about those that do not fit."""

"""Files and settings that a stranger may hand over, each with what this project promises to do with it."""

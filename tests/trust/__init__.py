"""What people and machines do to runs, files and rounds; see docs/trust.md."""

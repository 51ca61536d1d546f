"""Images, crops and their order."""

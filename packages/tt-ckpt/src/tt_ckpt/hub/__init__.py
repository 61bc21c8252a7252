"""The hub: download, upload, and whether files are what the hub has."""

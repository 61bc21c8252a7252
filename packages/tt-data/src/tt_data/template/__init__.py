"""Chat templates and prompts: found, run in a process of their own, and which of their characters are trained."""

"""Adapter folders as PEFT writes and reads them: their files, and what is checked before an adapter is loaded."""

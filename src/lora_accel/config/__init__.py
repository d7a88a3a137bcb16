"""The run config: its schema and files, the settings it shares with the launcher, and the plan. Never imports torch."""

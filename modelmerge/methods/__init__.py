"""The mathematics: torch in, torch out; no files, no devices, no printing."""

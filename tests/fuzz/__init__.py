"""Files of strangers, changed at random: `python -m tests.fuzz --seconds N --seed S`."""

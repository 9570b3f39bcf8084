"""`check_machine.py`: measures a machine before a benchmark, and names what is slow, silent or broken."""

"""The programs that train: what each needs, and what each can do."""

"""The page on which people draw from their runs, compare them and see them train: its tabs, and what each of them does."""

"""Where adapters lie: one contiguous buffer, and tables of offsets into it."""

"""Where other libraries meet flexnsa. Nothing in the core imports these modules; each imports the library it serves."""

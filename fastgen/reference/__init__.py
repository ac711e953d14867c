"""Plain torch: what each op means. The slow path where no kernel is built, and what the fast ones are held to."""

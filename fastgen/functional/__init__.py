"""The public functions: conventions, validation, differentiation."""

"""Other libraries' interfaces over this one. Each module is imported by the user, never by foredraft itself."""

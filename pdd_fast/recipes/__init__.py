"""Settings as TOML files, one a recipe; read by pdd_fast.settings."""

"""One file per model family: `build_stage`, under the name that config/families registers."""

"""Models as data, never as code: folders, GGUF files, packaged weights and the user's own modules."""

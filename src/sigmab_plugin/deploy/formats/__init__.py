"""One module per bundle format: ``export_artefact(source, options)``, ``requires(options)``, ``LIBRARIES``."""

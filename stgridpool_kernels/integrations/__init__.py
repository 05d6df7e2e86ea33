"""ST-GridPool inside engines, opt-in: one module per engine, each imported by name. See docs/integrations.md."""

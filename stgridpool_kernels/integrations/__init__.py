"""Opt-in integrations of ST-GridPool into engines, with one module per engine. See docs/integrations."""

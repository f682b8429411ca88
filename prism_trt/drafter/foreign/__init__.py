"""Drafters of other projects: EAGLE-1/2, HASS and the PRISM artifact."""

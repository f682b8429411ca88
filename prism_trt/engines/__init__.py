"""Engines: runtimes that execute a target and its drafter behind one protocol."""

"""Minimal servers of the same network on other frameworks, for side-by-side runs. They load files, not our packages."""

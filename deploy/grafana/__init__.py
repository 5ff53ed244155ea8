"""Grafana dashboards as code: ``python -m deploy.grafana.build`` writes the files in ``dashboards/``."""

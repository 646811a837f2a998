"""Files, hub ids and live models -> `Adapter`: weights and a config that belong to no model yet."""

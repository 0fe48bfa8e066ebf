"""The command line: words typed to configs, configs to tasks, errors to exit statuses."""

"""Load tests, each step a command: `deepseek loadtest`, `verdict`, `report` ...."""

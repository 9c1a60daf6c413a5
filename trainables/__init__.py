"""What one trial trains, and how it is judged: plain PyTorch, free of Ray, Optuna and MLflow."""

"""Train and calibrate exit heads with transformers."""

"""Configuration files; `--config NAME` uses one of them, here and in the installed package (`lvlm_jax.configs`)."""

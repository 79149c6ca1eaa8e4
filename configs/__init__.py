"""Configuration files; `--config NAME` takes one of them, here and in the installed package (`lvlm_jax.configs`)."""

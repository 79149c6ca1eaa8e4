"""Run by `test_hosts` in each of several processes: `lvlm evaluate`, with its arguments."""

from lvlm_jax.cli.main import run

if __name__ == "__main__":
    run("evaluate")

#!/usr/bin/env bash
# Trains the tiny recipe on this machine. What the environment and the command line can say: train.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" tiny "$@"

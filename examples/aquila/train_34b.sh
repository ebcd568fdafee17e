#!/usr/bin/env bash
# Aquila2-34B on a cluster: docs/aquila.md. What the environment and the command line can say: train.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" 34b "$@"

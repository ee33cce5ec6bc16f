#!/bin/bash
# measure.sh ADDRESS RATE: prints the loss
source "$(dirname "$BASH_SOURCE")/lib.sh"
echo "$1 at $2 Mbit/s: $(loss_at "$2") % lost"

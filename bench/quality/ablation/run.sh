#!/bin/bash
# usage: run.sh LIST SECONDS [WORKERS]
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
H=$(dirname $0); C=$(mktemp -d); export LIST=${LIST:-list2.py}
for i in $(seq 0 $((${WORKERS:-5}-1))); do timeout ${HARD:-146} python3 $H/bundle2.py ${SOFT:-128} cuda $i $C > $OUT/log$i 2>&1 & sleep 0.3; done
wait
cat $OUT/log* | sed 's/^16k  //' | sort -V | sed "s/ held.*//" | head -c 5800

#!/usr/bin/env bash
# TensorFlow's index shuffle leaves a short list as it was for seeds of zeros and ones.
#
# Versions: tensorflow-cpu 2.20.0; CPU.
# First guess: one seed is as good as another, and 4 rounds, the default of the op
# RandomIndexShuffle, are enough; of 24 indices about one stays in place.
# Seen: with 4 rounds the seeds (0, 0, 0), (0, 1, 0) and (1, 1, 1) leave 22, 20 and all 24 in place;
# with 8 rounds 0, 2 and 2. tf.random.experimental.index_shuffle, which hashes its two seeds first,
# leaves 2 at most for (0, 0), (0, 1) and (1, 0), with the same 4 rounds.
# The script fails where one of these counts changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorflow-cpu==2.20.0
cat > "$folder/shuffle.py" <<'PY'
import tensorflow as tf

COUNT = 24


def kept(shuffled):
    return sum(int(shuffled(tf.constant(i, tf.int64))) == i for i in range(COUNT))


def raw(rounds, seed):
    def shuffled(index):
        return tf.raw_ops.RandomIndexShuffle(
            index=index,
            seed=tf.constant(seed, tf.int64),
            max_index=tf.constant(COUNT - 1, tf.int64),
            rounds=rounds,
        )

    return kept(shuffled)


def public(seed):
    function = tf.random.experimental.index_shuffle
    return kept(lambda index: function(index, seed=seed, max_index=COUNT - 1))


seeds = [(0, 0, 0), (0, 1, 0), (1, 1, 1)]
four, eight = [raw(4, seed) for seed in seeds], [raw(8, seed) for seed in seeds]
hashed = [public(seed) for seed in [(0, 0), (0, 1), (1, 0)]]
print(f"tensorflow {tf.__version__}, of {COUNT} indices in place: raw op {four} with 4 rounds,")
print(f"{eight} with 8; the public function {hashed}")
assert four == [22, 20, 24] and eight == [0, 2, 2] and max(hashed) <= 2, "it shuffles otherwise"
PY
"$folder/venv/bin/python" "$folder/shuffle.py"

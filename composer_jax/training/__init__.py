"""One sharded train step and the loop that serves codec, CLIP and composer alike."""

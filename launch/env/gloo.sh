# Sourced by the batch script on nodes without GPUs; replaced by the colleague

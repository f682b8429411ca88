"""The cpu engine: a small C++ library compiled for one machine at build time.

It answers with the same bits whatever the number of tokens, rows, threads or tree branches in a call (see
`csrc/simd.h`), which is what makes speculative output identical to plain decoding.
"""

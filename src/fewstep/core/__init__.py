"""Left half (path, denoiser, cond, noise, tableau, sample, generator): knows no training.

Right half (role, fit, state, distributed): knows no diffusion.
"""

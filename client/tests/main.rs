//! The SDK against a scripted server in memory: one module for each part of its promise.

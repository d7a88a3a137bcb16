"""Replies, scores and chats of base, adapters and merged models."""

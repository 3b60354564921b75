"""The doctor behind ``chainward-site check``: is this hospital ready to take part?"""

"""Releases a new version through gates: candidate, shadow load, switch, rollback, and the journal of each release.

Enter: `deepseek release`, `rollback`, `releases`. Imports: `serving.{repository,embedded,doctor,stack}`; the gates are
other rooms' commands, run as processes.
"""

"""Redis and Celery. Carries jobs from the gateway to a worker and their output back.

`celery -A tasks` finds the app in `tasks.celery`.
"""

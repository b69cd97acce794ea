-- Version 2: a write to the journal may tell of progress. The tables are the same; records and bodies in them may be
-- short (short_forms.py), which an older program refuses to resume. All that such a program calls stays.

CREATE FUNCTION {schema}.write_journal(
    p_run_id text, p_token bigint, p_now double precision, p_steps text[], p_long_steps text[], p_numbers bigint[],
    p_records bytea[], p_crcs bigint[], p_again boolean, p_progress boolean
) RETURNS {schema}.outcome LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Journal rows, all or nothing, in the place of those with the same step and number. Progress sets recovery_attempts
-- to 0 with them.
#variable_conflict use_column
DECLARE
    v_run record;
    v_now double precision;
    v_result {schema}.outcome;
BEGIN
    PERFORM {schema}.durably();
    SELECT pk, owner, token, lease_until, sequence INTO v_run FROM {schema}.runs
    WHERE run_id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        v_result.what := 'not_found';
        RETURN v_result;
    END IF;
    v_now := {schema}.moment(p_now);
    v_result.last := v_run.sequence;
    IF p_token <> 0 AND (v_run.token <> p_token OR v_run.owner IS NULL) THEN
        v_result.what := 'lost';
    ELSIF p_token = 0 AND v_run.owner IS NOT NULL AND v_run.lease_until > v_now THEN
        v_result.what := 'busy';
        v_result.holder := v_run.owner;
        v_result.seconds_left := v_run.lease_until - v_now;
    END IF;
    IF v_result.what IS NOT NULL THEN
        -- An earlier try of this very call, whose answer was lost with its connection, may have done it.
        IF p_again AND NOT EXISTS (
            SELECT * FROM unnest(p_steps, p_numbers, p_records) AS wanted (step, number, record)
            EXCEPT SELECT step, number, record FROM {schema}.journal WHERE run_pk = v_run.pk
        ) THEN
            v_result.what := 'done';
        END IF;
        RETURN v_result;
    END IF;
    INSERT INTO {schema}.journal (run_pk, step, long_step, number, record, crc)
    SELECT v_run.pk, * FROM unnest(p_steps, p_long_steps, p_numbers, p_records, p_crcs)
    ON CONFLICT (run_pk, step, number) DO UPDATE SET record = excluded.record, crc = excluded.crc;
    IF p_progress THEN
        UPDATE {schema}.runs SET recovery_attempts = 0 WHERE pk = v_run.pk AND recovery_attempts <> 0;
    END IF;
    v_result.what := 'done';
    RETURN v_result;
END $$;

CREATE OR REPLACE FUNCTION {schema}.write_journal(
    p_run_id text, p_token bigint, p_now double precision, p_steps text[], p_long_steps text[], p_numbers bigint[],
    p_records bytea[], p_crcs bigint[], p_again boolean
) RETURNS {schema}.outcome LANGUAGE plpgsql AS $$
-- The call of version 1, for programs of that version that still have the store open: nothing told of progress then.
BEGIN
    RETURN {schema}.write_journal(
        p_run_id, p_token, p_now, p_steps, p_long_steps, p_numbers, p_records, p_crcs, p_again, false
    );
END $$;

COMMENT ON COLUMN {schema}.steps.record IS 'The commit''s records as JSON; that of a single step is a list';

COMMENT ON COLUMN {schema}.checkpoints.body IS 'Position, counters and totals as JSON, in the format that its v names';

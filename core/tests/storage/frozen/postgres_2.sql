-- A store of schema version 2 with one run, as it was released. Never changed.
CREATE SCHEMA {schema};
CREATE TABLE {schema}.surefoot_migrations (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp());
INSERT INTO {schema}.surefoot_migrations (version) VALUES (1), (2);

-- Version 1: everything. {schema} and {channel} are put in by postgres_schema.py.
--
-- Texts that may hold NUL, which PostgreSQL's text cannot, are written with an escape (postgres_rows.py). Those that are
-- indexed are shortened past 1,000 bytes, which is what an index entry takes; the whole text is then in long_*.
-- Times are seconds since the epoch. Checksums are made and checked by the library.
--
-- Functions plan each statement once, for any values, and always with the indexes: a plan made while a table was empty
-- would read all of it for as long as the connection lives.

CREATE TABLE {schema}.runs (
    pk bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text COLLATE "C" NOT NULL UNIQUE,
    executor_type text NOT NULL,
    goal_id text NOT NULL,
    fingerprint text COLLATE "C" NOT NULL,
    long_fingerprint text,
    header bytea NOT NULL,
    facts_crc bigint NOT NULL,
    state text NOT NULL,
    sequence bigint NOT NULL DEFAULT 0,
    created_at double precision NOT NULL,
    updated_at double precision NOT NULL,
    error text,
    owner text,
    token bigint NOT NULL,
    lease_until double precision NOT NULL,
    recovery_attempts integer NOT NULL DEFAULT 0,
    parent_run_id text COLLATE "C",
    wake_at double precision,
    messaged boolean NOT NULL DEFAULT false,
    made_key bigint NOT NULL,
    claim_key bigint
) WITH (fillfactor = 70);

COMMENT ON COLUMN {schema}.runs.made_key IS
    'Names the call that made the row, so that it knows its own after the connection broke; claim_key that of the last claim';

COMMENT ON COLUMN {schema}.runs.lease_until IS 'The end of the owner''s lease; 0 when nobody holds the run';

CREATE INDEX runs_by_creation ON {schema}.runs (created_at, run_id);

CREATE INDEX runs_by_state ON {schema}.runs (state, created_at, run_id) WHERE state <> 'completed';

CREATE INDEX runs_by_lease ON {schema}.runs (lease_until) WHERE state = 'running';

CREATE INDEX runs_by_waking ON {schema}.runs (wake_at, run_id) WHERE wake_at IS NOT NULL AND state = 'paused';

CREATE INDEX runs_messaged ON {schema}.runs (run_id) WHERE messaged AND state = 'paused';

CREATE INDEX runs_by_change ON {schema}.runs (state, updated_at, run_id);

CREATE INDEX runs_by_parent ON {schema}.runs (parent_run_id) WHERE parent_run_id IS NOT NULL;

CREATE INDEX runs_by_fingerprint ON {schema}.runs (fingerprint);

CREATE TABLE {schema}.definitions (
    fingerprint text COLLATE "C" PRIMARY KEY,
    body bytea NOT NULL,
    crc bigint NOT NULL
);

CREATE TABLE {schema}.steps (
    run_pk bigint NOT NULL,
    sequence bigint NOT NULL,
    record bytea NOT NULL,
    log bytea,
    crc bigint NOT NULL,
    sets text[],
    write_key bigint NOT NULL,
    PRIMARY KEY (run_pk, sequence)
);

COMMENT ON COLUMN {schema}.steps.write_key IS
    'Names the call that made the commit, so that it knows its own after the connection broke';

COMMENT ON COLUMN {schema}.steps.sets IS 'The keys of the state that the commit set or deleted, for retention';

CREATE TABLE {schema}.checkpoints (
    run_pk bigint NOT NULL,
    sequence bigint NOT NULL,
    checkpoint_id text NOT NULL,
    body bytea NOT NULL,
    crc bigint NOT NULL,
    at double precision NOT NULL,
    PRIMARY KEY (run_pk, sequence)
);

CREATE TABLE {schema}.pins (
    run_pk bigint NOT NULL,
    sequence bigint NOT NULL,
    note text NOT NULL,
    pinned_at double precision NOT NULL,
    PRIMARY KEY (run_pk, sequence)
);

COMMENT ON TABLE {schema}.pins IS 'What retention leaves alone; sequence 0 stands for the run itself';

CREATE TABLE {schema}.retired (run_pk bigint PRIMARY KEY);

COMMENT ON TABLE {schema}.retired IS 'Runs that are gone and whose rows in other tables are still to be removed';

CREATE TABLE {schema}.chunks (
    run_pk bigint NOT NULL,
    sequence bigint NOT NULL,
    op smallint NOT NULL,
    key text COLLATE "C" NOT NULL,
    long_key text,
    data bytea NOT NULL,
    checksum bytea NOT NULL,
    PRIMARY KEY (run_pk, key, sequence)
);

-- Values are compressed, or not, by the library: trying again here costs time with every commit.
ALTER TABLE {schema}.chunks ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE {schema}.journal (
    run_pk bigint NOT NULL,
    step text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    long_step text,
    record bytea NOT NULL,
    crc bigint NOT NULL,
    PRIMARY KEY (run_pk, step, number)
);

CREATE TABLE {schema}.messages (
    pk bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_pk bigint NOT NULL,
    name text COLLATE "C" NOT NULL,
    long_name text,
    body bytea NOT NULL,
    sent_at double precision NOT NULL,
    crc bigint NOT NULL,
    write_key bigint NOT NULL,
    UNIQUE (run_pk, name)
);

CREATE TABLE {schema}.documents (
    pk bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text COLLATE "C" NOT NULL UNIQUE,
    goal_id text COLLATE "C" NOT NULL,
    long_goal_id text,
    status text NOT NULL,
    body bytea NOT NULL,
    crc bigint NOT NULL
);

CREATE INDEX documents_by_goal ON {schema}.documents (goal_id);

CREATE INDEX documents_by_status ON {schema}.documents (status);

CREATE TABLE {schema}.run_nodes (
    node_id text COLLATE "C" NOT NULL,
    run_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (node_id, run_id)
);

CREATE INDEX run_nodes_by_run ON {schema}.run_nodes (run_id);

CREATE FUNCTION {schema}.durably() RETURNS void LANGUAGE plpgsql AS $$
-- What is told to be committed must be on disk, whatever the database or the role has been set to.
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
END $$;

CREATE FUNCTION {schema}.moment(p_now double precision) RETURNS double precision LANGUAGE sql AS $$
-- The time by this database's clock, unless a test gives another.
    SELECT coalesce(p_now, extract(epoch FROM clock_timestamp())::double precision)
$$;

CREATE FUNCTION {schema}.tell_workers(p_run_id text) RETURNS void LANGUAGE sql AS $$
-- Wakes who listens, when this transaction commits: the run may have something to do.
    SELECT pg_notify('{channel}', p_run_id)
$$;

CREATE FUNCTION {schema}.accept_run(
    p_run_id text, p_executor_type text, p_goal_id text, p_fingerprint text, p_long_fingerprint text, p_header bytea,
    p_facts_crc bigint, p_parent_run_id text, p_definition bytea, p_definition_crc bigint, p_definition_lock bigint,
    p_owner text, p_lease_seconds double precision, p_now double precision, p_key bigint,
    p_ops smallint[], p_keys text[], p_long_keys text[], p_datas bytea[], p_checksums bytea[]
) RETURNS boolean LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Records a run; whether it was this call, or an earlier try of it, that did.
#variable_conflict use_column
DECLARE
    v_now double precision := {schema}.moment(p_now);
    v_pk bigint;
BEGIN
    PERFORM {schema}.durably();
    PERFORM pg_advisory_xact_lock_shared(p_definition_lock);  -- against delete_run
    INSERT INTO {schema}.runs (run_id, executor_type, goal_id, fingerprint, long_fingerprint, header, facts_crc, state,
        created_at, updated_at, owner, token, lease_until, parent_run_id, made_key)
    VALUES (p_run_id, p_executor_type, p_goal_id, p_fingerprint, p_long_fingerprint, p_header, p_facts_crc, 'running',
        v_now, v_now, p_owner, CASE WHEN p_owner IS NULL THEN 0 ELSE 1 END,
        CASE WHEN p_owner IS NULL THEN 0 ELSE v_now + p_lease_seconds END, p_parent_run_id, p_key)
    ON CONFLICT (run_id) DO NOTHING RETURNING pk INTO v_pk;
    IF v_pk IS NULL THEN
        RETURN EXISTS (SELECT 1 FROM {schema}.runs WHERE run_id = p_run_id AND made_key = p_key);
    END IF;
    INSERT INTO {schema}.definitions (fingerprint, body, crc) VALUES (p_fingerprint, p_definition, p_definition_crc)
    ON CONFLICT (fingerprint) DO NOTHING;
    IF p_keys IS NOT NULL THEN
        INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum)
        SELECT v_pk, 0, * FROM unnest(p_ops, p_keys, p_long_keys, p_datas, p_checksums);
    END IF;
    IF p_owner IS NULL THEN
        PERFORM {schema}.tell_workers(p_run_id);
    END IF;
    RETURN true;
END $$;

CREATE FUNCTION {schema}.drop_chunks(p_run_pk bigint, p_since bigint, p_after bigint, p_upto bigint) RETURNS void
LANGUAGE plpgsql AS $$
-- Drops the chunks that only checkpoints between p_after and p_upto could reach, of which none is left: those before
-- their key's last set at or before p_upto, and that one too if it is a delete with nothing earlier to hide. Only keys
-- set since the oldest checkpoint dropped, p_since, can have gained one. Sequence 0, the input, always stays.
BEGIN
    WITH bases AS (
        SELECT touched.key, (
            SELECT max(chunks.sequence) FROM {schema}.chunks
            WHERE chunks.run_pk = p_run_pk AND chunks.key = touched.key AND chunks.op <> 0
            AND chunks.sequence > p_after AND chunks.sequence <= p_upto
        ) AS sequence
        FROM (
            SELECT DISTINCT unnest(steps.sets) AS key FROM {schema}.steps
            WHERE steps.run_pk = p_run_pk AND steps.sequence BETWEEN p_since AND p_upto AND steps.sets IS NOT NULL
        ) AS touched
    )
    DELETE FROM {schema}.chunks USING bases
    WHERE chunks.run_pk = p_run_pk AND chunks.key = bases.key AND chunks.sequence > p_after AND (
        chunks.sequence < bases.sequence
        OR chunks.sequence = bases.sequence AND chunks.op = 2 AND NOT EXISTS (
            SELECT 1 FROM {schema}.chunks AS earlier
            WHERE earlier.run_pk = p_run_pk AND earlier.key = bases.key AND earlier.sequence <= p_after
        )
    );
END $$;

CREATE FUNCTION {schema}.drop_checkpoint(p_run_pk bigint, p_sequence bigint) RETURNS void LANGUAGE plpgsql AS $$
-- Drops a checkpoint from between the others, unless it is pinned.
DECLARE
    v_before bigint;
    v_after bigint;
BEGIN
    PERFORM 1 FROM {schema}.pins WHERE run_pk = p_run_pk AND sequence = p_sequence;
    IF FOUND THEN
        RETURN;
    END IF;
    DELETE FROM {schema}.checkpoints WHERE run_pk = p_run_pk AND sequence = p_sequence;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT max(sequence) INTO v_before FROM {schema}.checkpoints WHERE run_pk = p_run_pk AND sequence < p_sequence;
    SELECT min(sequence) INTO v_after FROM {schema}.checkpoints WHERE run_pk = p_run_pk AND sequence > p_sequence;
    IF v_after IS NOT NULL THEN
        PERFORM {schema}.drop_chunks(p_run_pk, p_sequence, coalesce(v_before, 0), v_after);
    END IF;
END $$;

CREATE FUNCTION {schema}.drop_below(p_run_pk bigint, p_oldest bigint) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Drops the checkpoints below the retained one p_oldest that are not pinned; how many went.
DECLARE
    v_upto bigint;
    v_after bigint := 0;
    v_since bigint;
    v_gone bigint;
    v_dropped bigint := 0;
BEGIN
    -- Between two that stay, all go at once.
    FOR v_upto IN
        SELECT pins.sequence FROM {schema}.pins
        WHERE pins.run_pk = p_run_pk AND pins.sequence > 0 AND pins.sequence < p_oldest
        UNION ALL SELECT p_oldest ORDER BY 1
    LOOP
        SELECT min(sequence) INTO v_since FROM {schema}.checkpoints WHERE run_pk = p_run_pk AND sequence > v_after;
        IF v_since < v_upto THEN
            DELETE FROM {schema}.checkpoints WHERE run_pk = p_run_pk AND sequence > v_after AND sequence < v_upto;
            GET DIAGNOSTICS v_gone = ROW_COUNT;
            v_dropped := v_dropped + v_gone;
            PERFORM {schema}.drop_chunks(p_run_pk, v_since, v_after, v_upto);
        END IF;
        v_after := v_upto;
    END LOOP;
    RETURN v_dropped;
END $$;

CREATE FUNCTION {schema}.prune_run(p_run_pk bigint, p_keep bigint, p_needed bigint) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Drops all but the newest p_keep checkpoints; pinned ones, and those from sequence p_needed on, stay in any case. How
-- many went.
DECLARE
    v_oldest bigint;
    v_first bigint;
BEGIN
    SELECT sequence INTO v_oldest FROM {schema}.checkpoints WHERE run_pk = p_run_pk
    ORDER BY sequence DESC LIMIT 1 OFFSET greatest(p_keep - 1, 0);
    SELECT min(sequence) INTO v_first FROM {schema}.checkpoints WHERE run_pk = p_run_pk;
    IF v_oldest IS NULL OR v_first = v_oldest THEN
        RETURN 0;
    END IF;
    RETURN {schema}.drop_below(p_run_pk, least(v_oldest, p_needed));
END $$;

CREATE TYPE {schema}.outcome AS (what text, holder text, seconds_left double precision, last bigint);

COMMENT ON TYPE {schema}.outcome IS
    'What became of a write: done, not_found, lost (the lease), busy (holder, seconds_left), conflict (last)';

CREATE FUNCTION {schema}.commit_run(
    p_run_id text, p_token bigint, p_sequence bigint, p_key bigint, p_now double precision, p_record bytea, p_log bytea,
    p_crc bigint, p_sets text[], p_checkpoint_id text, p_checkpoint bytea, p_checkpoint_crc bigint, p_ops smallint[],
    p_keys text[], p_long_keys text[], p_datas bytea[], p_checksums bytea[], p_journal_done text[], p_replaces bigint,
    p_state text, p_error text, p_wake_at double precision, p_progress boolean, p_release boolean, p_keep bigint
) RETURNS {schema}.outcome LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- One commit, all or nothing. Each statement in here sees what was committed before it began, so what is read after the
-- run's row is locked is the truth; nothing is written before all checks have passed.
#variable_conflict use_column
DECLARE
    v_run record;
    v_now double precision;
    v_result {schema}.outcome;
    v_state text;
BEGIN
    PERFORM {schema}.durably();
    SELECT pk, owner, token, lease_until, sequence, state INTO v_run FROM {schema}.runs
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
    ELSIF p_sequence <> v_run.sequence + 1 THEN
        v_result.what := 'conflict';
    END IF;
    IF v_result.what IS NOT NULL THEN
        -- An earlier try of this very call, whose answer was lost with its connection, may have done it.
        PERFORM 1 FROM {schema}.steps WHERE run_pk = v_run.pk AND sequence = p_sequence AND write_key = p_key;
        IF FOUND THEN
            v_result.what := 'done';
        END IF;
        RETURN v_result;
    END IF;
    INSERT INTO {schema}.steps (run_pk, sequence, record, log, crc, sets, write_key)
    VALUES (v_run.pk, p_sequence, p_record, p_log, p_crc, p_sets, p_key);
    IF p_checkpoint_id IS NOT NULL THEN
        INSERT INTO {schema}.checkpoints (run_pk, sequence, checkpoint_id, body, crc, at)
        VALUES (v_run.pk, p_sequence, p_checkpoint_id, p_checkpoint, p_checkpoint_crc, v_now);
    END IF;
    IF p_keys IS NOT NULL THEN
        INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum)
        SELECT v_run.pk, p_sequence, * FROM unnest(p_ops, p_keys, p_long_keys, p_datas, p_checksums);
    END IF;
    IF p_journal_done IS NOT NULL THEN
        DELETE FROM {schema}.journal WHERE run_pk = v_run.pk AND step = ANY (p_journal_done);
    END IF;
    IF p_replaces IS NOT NULL THEN
        PERFORM {schema}.drop_checkpoint(v_run.pk, p_replaces);
    END IF;
    v_state := coalesce(p_state, v_run.state);
    -- Without a state only the sequence changes, which no index has: a heap-only update.
    UPDATE {schema}.runs SET
        sequence = p_sequence,
        state = v_state,
        error = CASE WHEN p_state IS NULL THEN error ELSE p_error END,
        updated_at = CASE WHEN p_state IS NULL THEN updated_at ELSE v_now END,
        wake_at = CASE WHEN p_state IS NULL THEN wake_at ELSE p_wake_at END,
        recovery_attempts = CASE WHEN p_progress THEN 0 ELSE recovery_attempts END,
        owner = CASE WHEN p_release THEN NULL ELSE owner END,
        lease_until = CASE WHEN p_release THEN 0 ELSE lease_until END
    WHERE pk = v_run.pk;
    IF p_keep IS NOT NULL THEN
        PERFORM {schema}.prune_run(v_run.pk, p_keep, NULL);
    END IF;
    IF p_wake_at IS NOT NULL OR p_release AND v_state <> 'completed' THEN
        PERFORM {schema}.tell_workers(p_run_id);
    END IF;
    v_result.what := 'done';
    RETURN v_result;
END $$;

CREATE FUNCTION {schema}.write_journal(
    p_run_id text, p_token bigint, p_now double precision, p_steps text[], p_long_steps text[], p_numbers bigint[],
    p_records bytea[], p_crcs bigint[], p_again boolean
) RETURNS {schema}.outcome LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Journal rows, all or nothing, in the place of those with the same step and number.
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
    v_result.what := 'done';
    RETURN v_result;
END $$;

CREATE FUNCTION {schema}.leave_message(
    p_run_id text, p_now double precision, p_key bigint, p_name text, p_long_name text, p_body bytea, p_crc bigint
) RETURNS text LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
-- Leaves a message; done, not_found, completed or taken (its name).
#variable_conflict use_column
DECLARE
    v_run record;
BEGIN
    PERFORM {schema}.durably();
    SELECT pk, state, messaged INTO v_run FROM {schema}.runs WHERE run_id = p_run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'not_found';
    END IF;
    PERFORM 1 FROM {schema}.messages WHERE run_pk = v_run.pk AND name = p_name AND write_key = p_key;
    IF FOUND THEN
        RETURN 'done';  -- by an earlier try, whose answer was lost
    ELSIF v_run.state = 'completed' THEN
        RETURN 'completed';
    END IF;
    INSERT INTO {schema}.messages (run_pk, name, long_name, body, sent_at, crc, write_key)
    VALUES (v_run.pk, p_name, p_long_name, p_body, {schema}.moment(p_now), p_crc, p_key)
    ON CONFLICT (run_pk, name) DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'taken';
    END IF;
    IF NOT v_run.messaged THEN
        UPDATE {schema}.runs SET messaged = true WHERE pk = v_run.pk;
    END IF;
    PERFORM {schema}.tell_workers(p_run_id);
    RETURN 'done';
END $$;

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

INSERT INTO {schema}.runs (pk, run_id, executor_type, goal_id, fingerprint, long_fingerprint, header, facts_crc, state, sequence, created_at, updated_at, error, owner, token, lease_until, recovery_attempts, parent_run_id, wake_at, messaged, made_key, claim_key) OVERRIDING SYSTEM VALUE VALUES (1, 'run_1', 'graph', 'goal_1', 'f1', NULL, '\x7b22696e7075745f6b657973223a5b5d7d'::bytea, 1655309711, 'paused', 2, 1000000.0, 1000000.0, NULL, NULL, 1, 0.0, 0, NULL, NULL, true, 7686081810171748610, NULL);
ALTER TABLE {schema}.runs ALTER COLUMN pk RESTART WITH 100;
INSERT INTO {schema}.definitions (fingerprint, body, crc) VALUES ('f1', '\x7b226e6f646573223a5b2261225d7d'::bytea, 3444694604);
INSERT INTO {schema}.steps (run_pk, sequence, record, log, crc, sets, write_key) VALUES (1, 1, '\x5b7b226b696e64223a2273746570222c226e6f6465223a226e31227d5d'::bytea, '\x5b2264656369646564225d'::bytea, 1053881893, '{list,gone}', 7720834939284358913);
INSERT INTO {schema}.steps (run_pk, sequence, record, log, crc, sets, write_key) VALUES (1, 2, '\x5b7b226b696e64223a2273746570222c226e6f6465223a226e32227d5d'::bytea, NULL, 2605854276, NULL, 7730732146626355587);
INSERT INTO {schema}.checkpoints (run_pk, sequence, checkpoint_id, body, crc, at) VALUES (1, 1, 'ckpt_1', '\x7b2276223a312c22737465705f6e756d626572223a317d'::bytea, 295990345, 1000000.0);
INSERT INTO {schema}.checkpoints (run_pk, sequence, checkpoint_id, body, crc, at) VALUES (1, 2, 'ckpt_2', '\x7b2276223a312c22737465705f6e756d626572223a327d'::bytea, 1647714253, 1000000.0);
INSERT INTO {schema}.pins (run_pk, sequence, note, pinned_at) VALUES (1, 1, 'evidence', 1000000.0);
INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) VALUES (1, 0, 1, 'input', NULL, '\x5b315d'::bytea, '\x78f9ec81222748df'::bytea);
INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) VALUES (1, 0, 1, 'gone', NULL, '\x227822'::bytea, '\x886e58512eeadb07'::bytea);
INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) VALUES (1, 1, 1, 'list', NULL, '\x5b315d'::bytea, '\x592f16b00c550bd3'::bytea);
INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) VALUES (1, 1, 2, 'gone', NULL, '\x'::bytea, '\x34fb0dbb6b352de4'::bytea);
INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) VALUES (1, 2, 0, 'list', NULL, '\x32'::bytea, '\x2eb8fb50c91ad75b'::bytea);
INSERT INTO {schema}.journal (run_pk, step, number, long_step, record, crc) VALUES (1, 's', 1, NULL, '\x6a'::bytea, 2865545848);
INSERT INTO {schema}.messages (pk, run_pk, name, long_name, body, sent_at, crc, write_key) OVERRIDING SYSTEM VALUE VALUES (1, 1, 'answer', NULL, '\x796573'::bytea, 1000000.0, 1360845974, 5449909619544708518);
ALTER TABLE {schema}.messages ALTER COLUMN pk RESTART WITH 100;
INSERT INTO {schema}.documents (pk, run_id, goal_id, long_goal_id, status, body, crc) OVERRIDING SYSTEM VALUE VALUES (1, 'run_1', 'goal_1', NULL, 'running', '\x7b226964223a2272756e5f31222c22676f616c5f6964223a22676f616c5f31222c22737461727465645f6174223a22323032362d31312d32335431383a34303a33372e313432333237222c22737461747573223a2272756e6e696e67222c22636f6d706c657465645f6174223a6e756c6c2c226465636973696f6e73223a5b7b226964223a2264222c226e6f64655f6964223a226e31222c22696e74656e74223a2269222c2274696d657374616d70223a22323032362d31312d32335431383a34303a33372e313432343032222c226465636973696f6e5f74797065223a22637573746f6d222c226f7074696f6e73223a5b5d2c2263686f73656e5f6f7074696f6e5f6964223a22222c22726561736f6e696e67223a22222c226163746976655f636f6e73747261696e7473223a5b5d2c22696e7075745f636f6e74657874223a7b7d2c226f7574636f6d65223a6e756c6c2c226576616c756174696f6e223a6e756c6c2c2263686f73656e5f6f7074696f6e223a6e756c6c2c227761735f7375636365737366756c223a66616c73652c227761735f676f6f645f6465636973696f6e223a66616c73657d5d2c2270726f626c656d73223a5b5d2c226d657472696373223a7b22746f74616c5f6465636973696f6e73223a312c227375636365737366756c5f6465636973696f6e73223a302c226661696c65645f6465636973696f6e73223a302c22746f74616c5f746f6b656e73223a302c22746f74616c5f6c6174656e63795f6d73223a302c226e6f6465735f6578656375746564223a5b226e31225d2c2265646765735f747261766572736564223a5b5d2c22737563636573735f72617465223a302e307d2c226e6172726174697665223a22222c22676f616c5f6465736372697074696f6e223a22222c22696e7075745f64617461223a7b7d2c226f75747075745f64617461223a7b7d2c226475726174696f6e5f6d73223a307d'::bytea, 2634520602);
ALTER TABLE {schema}.documents ALTER COLUMN pk RESTART WITH 100;
INSERT INTO {schema}.run_nodes (node_id, run_id) VALUES ('n1', 'run_1');
